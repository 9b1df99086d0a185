"""Whose request it is, as a number that tells nothing of who that is.

Workers keep what an owner's requests have in common, and never give it to another's. They need to
know who is the same, not who it is: the API key goes no further than into this hash. All routers
of a mesh must come to the same hash, so that it has no secret of its own; a key that can be guessed
can be found by trying.
"""

from hashlib import blake2b

__all__ = ("bearer_key", "owner_of")


def bearer_key(authorization: bytes) -> bytes:
    """The key of an `Authorization: Bearer KEY` header; empty for another scheme."""
    scheme, _, key = authorization.strip().partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def owner_of(key: bytes, user: str) -> str:
    """BLAKE2b over API key and the request's `user`, 16 hex digits; empty when both are absent."""
    if not key and not user:
        return ""
    # the size keeps (ab, c) and (a, bc) apart
    data = b"%d:%b%b" % (len(key), key, user.encode())
    return blake2b(data, digest_size=8, person=b"mesh owner").hexdigest()
