"""What schemathesis checks besides its own checks."""

import schemathesis


@schemathesis.check
def no_server_error(ctx, response, case):
    """No 5xx, but a refusal that says when to come again: a full house is no mistake."""
    refusal = response.status_code == 503 and "retry-after" in response.headers
    assert response.status_code < 500 or refusal, f"{response.status_code}: {response.text[:200]}"


@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag")
def as_text(ctx, value):
    """Whatever was thought up, as it stands."""
    return str(value).encode()
