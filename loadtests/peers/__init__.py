"""Other engines measured beside ours: how they are built, driven and compared."""
