"""The operator's command line: starts, inspects, chats. Speaks the protocol, imports no internals."""
