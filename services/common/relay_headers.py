"""The header fields by which a client of Postroad could steer the relay. Pure.

Some relays take recipients, accounts, tags or times from fields of a mail. What belongs to a client's text is
then an instruction under the account of the operator.
"""

from __future__ import annotations

__all__ = ["steers_a_relay"]

_FIELDS = frozenset(
    {
        # Recipients: old sendmail and qmail, Exchange's and IIS's pickup directories, and further ones.
        *("apparently-to", "x-apparently-to", "x-receiver", "x-sender", "envelope-to", "x-envelope-to"),
        *("x-rcpt-to", "x-original-to"),
        # SendGrid and SparkPost take a JSON document each, recipients included.
        *("x-smtpapi", "x-msys-api"),
    }
)
_FAMILIES = (
    *("x-mc-", "x-mandrill-"),  # Mandrill
    *("x-mailgun-", "x-ses-", "x-pm-", "x-postmark-"),  # Mailgun, Amazon SES, Postmark
    *("x-mj-", "x-mailjet-"),  # Mailjet
    *("x-mailin-", "x-sib-", "x-sendinblue-"),  # Brevo
    *("x-elasticemail-", "x-smtp2go-", "x-smtpeter-"),
    *("x-socketlabs-", "x-xs"),  # SocketLabs: X-xsMailingId
    *("x-tipimail-", "x-tm-"),  # Tipimail: X-TM-TEMPLATE
    "x-mt-",  # Mailtrap
    "x-ms-exchange-organization-",  # Exchange's own verdicts, among them that a mail is no spam
)


def steers_a_relay(name: str) -> bool:
    """Return whether some relay takes instructions from the field of this name, in lower case."""
    return name in _FIELDS or name.startswith(_FAMILIES)
