"""The operator's command line: starts, inspects, chats. Knows the protocol only."""
