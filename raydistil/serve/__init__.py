"""Serving: the exported student on Ray Serve, over HTTP."""
