"""What routers, workers and the command line share: the wire, the bus, and pure policy."""

__version__ = "0.1.0"
