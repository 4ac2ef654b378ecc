"""The status page, and the recent requests that it shows. Health, ledger and roll back are in `edits.py`.

The page is one static file that holds nothing of the user's. What it shows it asks for, with the runtime token where
that is needed. The token comes in the address's fragment, which no browser sends, and is taken out of the address bar.
Intents, paths and messages are hostile text: the page sets text alone, and its policy allows no script or style but its
own two blocks, by their hashes, and no markup made from strings (Trusted Types).

Not protected against: other users of this machine who see the browser's command line at the moment it is started.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lsp_server.http.models import service_of
from lsp_server.http.responses import Json

router = APIRouter()

_FILE = Path(__file__).with_name("status.html")


@router.get("/status", include_in_schema=False)
async def status() -> Response:
    """The page."""
    content, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Response(content, media_type="text/html", headers=headers)


@router.get("/requests")
async def requests(request: Request) -> Response:
    """The latest generations, newest first, without their texts."""
    service = service_of(request)
    service.check_token(request)
    return Json({"requests": [call.to_json() for call in reversed(service.generations.recent)]})


@cache
def _page() -> tuple[bytes, str]:
    """The page and its Content-Security-Policy."""
    text = _FILE.read_text(encoding="utf-8")  # newlines as the browser counts them in a hash
    directives = (
        "default-src 'none'",
        f"script-src {_hash_of('script', text)}",
        f"style-src {_hash_of('style', text)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return text.encode("utf-8"), "; ".join(directives)


def _hash_of(tag: str, text: str) -> str:
    (block,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(block.encode('utf-8')).digest()).decode('ascii')}'"
