"""What crosses the wire from teacher to student."""
