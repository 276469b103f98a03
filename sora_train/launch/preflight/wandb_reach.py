"""Whether Weights & Biases will take what an online run sends: a key, and a host that answers and knows it."""

from __future__ import annotations

import base64
import json
import netrc
import os
import urllib.error
import urllib.request
from typing import Literal
from urllib.parse import urlparse

from sora_train.launch.preflight.verdicts import Check, failed, passed

ANSWER_S = 5.0
OTHERWISE = "or set tracking.wandb to offline: `wandb sync` uploads later"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go along to wherever it leads."""

    def redirect_request(self, *_: object) -> None:
        return None


def check_wandb(mode: Literal["online", "offline", "off"]) -> Check:
    """The row of the table. The key goes to wandb's host and nowhere else."""
    if mode != "online":
        return passed("wandb", "written to the run's folder; `wandb sync` uploads it" if mode == "offline" else "off")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    key = os.environ.get("WANDB_API_KEY") or key_in_netrc(urlparse(host).hostname or "")
    if not key:
        return failed("wandb", f"no API key: set WANDB_API_KEY, or run `wandb login`, {OTHERWISE}")
    request = urllib.request.Request(
        f"{host}/graphql",
        json.dumps({"query": "query { viewer { username } }"}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
        },
    )
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=ANSWER_S) as answer:
            known = (json.loads(answer.read(2**16)).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return failed("wandb", f"{host} answers {error.code}: try again later, {OTHERWISE}")
        known = None
    except (OSError, ValueError, AttributeError) as error:
        return failed("wandb", f"{host} can't be reached ({error}): mend the network or the proxy, {OTHERWISE}")
    if not known:
        return failed("wandb", f"{host} does not know the API key: make another at {host}/authorize, {OTHERWISE}")
    return passed("wandb", f"{host} knows the API key")


def key_in_netrc(host: str) -> str:
    """What `wandb login` left."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return (found[2] or "") if found else ""
