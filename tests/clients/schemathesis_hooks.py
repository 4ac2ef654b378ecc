"""For schemathesis: a fault of the server is any status from 500 on but 503 and 504, which the document names."""

from __future__ import annotations

import schemathesis


@schemathesis.check
def documented_faults_only(ctx, response, case) -> None:
    assert response.status_code < 500 or response.status_code in (503, 504), f"{response.status_code}: {response.text}"
    if response.status_code == 503:
        assert "retry-after" in response.headers
