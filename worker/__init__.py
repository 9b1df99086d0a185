"""The GPU host: an agent on the bus and one engine process per loaded model."""
