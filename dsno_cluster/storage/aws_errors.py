"""What errors of the AWS libraries mean: credentials and settings that are wrong, and refusals by the server."""

from __future__ import annotations

import email.utils
import json
import time
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.errors import WorkError, without_passwords

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from botocore.session import Session

CLOCK_SECONDS = 900.0  # S3 refuses signatures that are further from its own time

# error codes of the server that have one cause, in words
_MEANING = {
    "ExpiredToken": "the session token has expired; get new credentials",
    "TokenRefreshRequired": "the session token has expired; get new credentials",
    "InvalidToken": "the server does not accept the session token (AWS_SESSION_TOKEN, or that of the profile)",
    "InvalidAccessKeyId": "the server does not know the access key (AWS_ACCESS_KEY_ID, or that of the profile)",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "AuthorizationHeaderMalformed": "the region is wrong; set AWS_DEFAULT_REGION to that of the bucket",
    "PermanentRedirect": "the bucket is elsewhere; set AWS_DEFAULT_REGION to its region, or storage.endpoint_url to its server",
}


class CredentialsError(WorkError):
    """No credentials can be had, or the AWS settings are wrong."""


def explain_settings(error: Exception, session: Session) -> str:
    """Whose error it is that no credentials were found, or no client can be made, in one line."""
    from botocore import exceptions
    from botocore.exceptions import (
        ConfigParseError,
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
        SSOError,
        TokenRetrievalError,
    )

    if isinstance(error, NoCredentialsError):
        return "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
    if isinstance(error, ProfileNotFound):
        return f"AWS_PROFILE: there is no profile {session.profile} in ~/.aws/config or ~/.aws/credentials"
    reason = without_passwords(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ConfigParseError):  # then nothing can be asked of the session
        return f"the AWS settings: {reason}"
    if isinstance(error, PartialCredentialsError):
        return f"half of the AWS credentials is missing: {reason}"
    profile = session.profile or "default"
    logins = (SSOError, TokenRetrievalError, getattr(exceptions, "LoginError", SSOError))  # which came later
    if isinstance(error, logins):
        return f"AWS profile {profile}: {reason}; log in again, for example with `aws sso login --profile {profile}`"
    if _runs_a_program(session) and _is_of_the_program(error):
        return f"credential_process of the AWS profile {profile} {_of_the_program(error, reason)}"
    if isinstance(error, CredentialRetrievalError):
        return f"AWS credentials: {reason}"
    return f"the AWS settings (AWS_* variables, ~/.aws/config and ~/.aws/credentials): {reason}"


def _runs_a_program(session: Session) -> bool:
    return "credential_process" in session.get_scoped_config()


def _is_of_the_program(error: Exception) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError

    if isinstance(error, CredentialRetrievalError):
        return bool(error.kwargs.get("provider") == "custom-process")
    return not isinstance(error, BotoCoreError | ClientError)


def _of_the_program(error: Exception, reason: str) -> str:
    from botocore.exceptions import CredentialRetrievalError

    if isinstance(error, CredentialRetrievalError):
        said = " ".join(str(error.kwargs.get("error_msg", "")).split())
        return f"failed: {without_passwords(said) or 'without a word'}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | AttributeError):
        return "printed something other than credentials in JSON"
    if isinstance(error, OSError):
        return f"cannot be started: {reason}"
    return f"is not a command line: {reason}"


def explain_refusal(error: ClientError) -> tuple[str, bool]:
    """An error answer of the server in words, and whether it is about this machine's clock."""
    code = str(error.response.get("Error", {}).get("Code", "?"))
    about = error.response.get("ResponseMetadata", {})
    status, what = about.get("HTTPStatusCode") or 0, f"{code} (HTTP {about.get('HTTPStatusCode') or 0})"
    ahead = _seconds_ahead(about.get("HTTPHeaders", {}).get("date", ""))
    # the answer to a HEAD request has no code
    if ahead is not None and abs(ahead) > CLOCK_SECONDS and status == 403:
        which = "ahead of" if ahead > 0 else "behind"
        return (
            f"{what} this machine's clock is {console.duration(abs(ahead))} {which} the server's, and requests more than 15 min "
            "off are refused; set the clock",
            True,
        )
    if code in _MEANING:
        return f"{what} {_MEANING[code]}", False
    if code == "RequestTimeTooSkewed":
        return f"{what} this machine's clock differs from the server's, or the request was held up", False
    denied = " access is denied: are the keys right, and may they use this bucket?" if status == 403 else ""
    return what + denied, False


def _seconds_ahead(date: str) -> float | None:
    """How far this machine's clock is ahead of the time in a Date header; None without such a header."""
    try:
        return time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None
