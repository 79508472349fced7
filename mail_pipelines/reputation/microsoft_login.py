"""The login to Microsoft's SNDS: a person signs in once in a browser, and each run renews what that gave, in the file `reputation.microsoft_token_file`.

SNDS has one client of OAuth 2.0, the same for everybody and without a secret (RFC 7636). It lets the browser end at http://localhost alone, where nobody
answers if it is on another machine, so that address is copied. A refresh token is good for 90 days, and gives another one each time that it is used.
https://learn.microsoft.com/entra/identity-platform/v2-oauth2-auth-code-flow
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

from mail_pipelines.config import ReputationSettings
from mail_pipelines.dispatch.files import DispatchError, replace_file
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import oauth
from mail_pipelines.sources.kinds.http import PatientSession

CLIENT_ID = "a53a6cc1-a1cd-46f7-a4aa-281cdabec33c"
SCOPE = f"{CLIENT_ID}/.default offline_access"
REDIRECT = "http://localhost"
COMMAND = "mail-pipelines reputation sign-in"


@dataclass(frozen=True)
class SignIn:
    """A sign-in that has begun: `address` is where a browser goes, `finish` takes the address where it ended."""

    settings: ReputationSettings
    verifier: str
    state: str

    @classmethod
    def begin(cls, settings: ReputationSettings) -> SignIn:
        return cls(settings, secrets.token_urlsafe(48), secrets.token_urlsafe(16))

    @property
    def address(self) -> str:
        challenge = base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()
        query = {"client_id": CLIENT_ID, "response_type": "code", "redirect_uri": REDIRECT, "scope": SCOPE, "state": self.state}
        query |= {"code_challenge": challenge, "code_challenge_method": "S256", "prompt": "select_account"}
        return f"{_url(self.settings, 'authorize')}?{urlencode(query)}"

    def finish(self, ended_at: str, session: PatientSession) -> None:
        """Write the token file. Raises `SourceError` if Microsoft gives no token for this address, or it cannot be kept."""
        said = {name: values[0] for name, values in parse_qs(urlsplit(ended_at.strip()).query).items()}
        if "error" in said:
            raise SourceError(f"Microsoft did not sign you in ({said['error']}): begin again with the account that has access to SNDS")
        if "code" not in said:
            raise SourceError(f"expected the whole address, {REDIRECT}/?code=… to its end: begin again")
        if said.get("state") != self.state:
            raise SourceError("this is the address of another sign-in: begin again")
        form = {"grant_type": "authorization_code", "code": said["code"], "redirect_uri": REDIRECT, "code_verifier": self.verifier}
        response = session.post(_url(self.settings, "token"), data={**form, "client_id": CLIENT_ID, "scope": SCOPE})
        try:
            token = response.json()["refresh_token"]
        except (ValueError, KeyError, TypeError):
            why = f"status {response.status_code} {response.reason}"
            raise SourceError(f"Microsoft gives no token ({why}): its codes hold for a minute or so; begin again") from None
        _keep(self.settings, token)


def log_in(settings: ReputationSettings, session: PatientSession) -> None:
    """Log a session in by the token that is kept. Raises `SourceError` if nobody has signed in."""
    try:
        token = Path(settings.microsoft_token_file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{settings.microsoft_token_file} cannot be read ({why}): sign in by `{COMMAND}`, as the user that Dagster runs as") from None
    form = {"grant_type": "refresh_token", "refresh_token": token, "client_id": CLIENT_ID, "scope": SCOPE}
    oauth.log_in(session, _url(settings, "token"), form, keep=lambda newest: _keep(settings, newest))


def _url(settings: ReputationSettings, what: str) -> str:
    return f"{settings.microsoft_login_url.rstrip('/')}/{what}"


def _keep(settings: ReputationSettings, token: str) -> None:
    path = Path(settings.microsoft_token_file)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, token)
    except (OSError, DispatchError) as error:
        raise SourceError(f"Microsoft's newest token cannot be kept: {error}") from None
