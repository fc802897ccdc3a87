"""A rule that looks for personal data: e-mail, phone, card, IBAN and social security numbers.

It finds what has the form, not who it belongs to: always for a person to decide.
Source: ISO/IEC 7812-1 (Luhn's checksum), ISO 13616 (the IBAN's), ITU-T E.164 (lengths of numbers).
"""

from __future__ import annotations

import re

from outcrop.data.checks.texts import Texts
from outcrop.data.defects import Finding, Severity, shown

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,24}\b"
)
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d.,-]?\d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SSN = re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")
_PHONE = re.compile(
    # +1 (555) 010-0199, (555) 010-0199, 555-010-0199, 03-1234-5678
    r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}(?!\d)"
    r"|(?<![\w(])\(\d{3}\) ?\d{3}[-. ]\d{4}(?!\d)"
    r"|(?<![\d.-])\d{3}[-.]\d{3}[-.]\d{4}(?![\d.-]*\d)"
    r"|(?<![\d-])0\d{1,4}-\d{1,4}-\d{4}(?![\d-])"
)
# What each of them needs; most texts have neither, and are done with after these two.
_NINE_DIGITS = re.compile(r"\d(?:[ ().-]{0,2}\d){8}")
_IBAN_START = re.compile(r"[A-Z]{2}\d{2}[ A-Z0-9]{11}")


def pii(texts: Texts) -> Finding | None:
    """What has the form of personal data."""
    kinds: list[str] = []
    first = ""
    for _, text in texts.named:
        for kind, value in _find(text):
            if kind not in kinds:
                kinds.append(kind)
            first = first or value
    if not kinds:
        return None
    message = f"It seems to hold {' and '.join(kinds)}: {shown(first)}."
    return Finding("pii", Severity.REVIEW, message, shown(first))


def _find(text: str) -> list[tuple[str, str]]:
    found = []
    if "@" in text:
        found += [("an e-mail address", match[0]) for match in _EMAIL.finditer(text)]
    if _IBAN_START.search(text):
        found += [
            ("an IBAN", match[0])
            for match in _IBAN.finditer(text)
            if _is_iban(match[0]) or "IBAN" in text[max(match.start() - 20, 0) : match.start()]
        ]
    if _NINE_DIGITS.search(text):
        found += [
            ("a card number", match[0]) for match in _CARD.finditer(text) if _is_card(match[0])
        ]
        found += [("a social security number", match[0]) for match in _SSN.finditer(text)]
        found += [
            ("a phone number", match[0]) for match in _PHONE.finditer(text) if _is_phone(match[0])
        ]
    return found


def _is_card(text: str) -> bool:
    """Return whether the digits have a card's length and Luhn's checksum, and are not all alike."""
    digits = [int(character) for character in text if character.isdecimal()]
    if digits[0] not in (2, 3, 4, 5, 6) or len(set(digits)) < 2:
        return False
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    bare = text.replace(" ", "")
    if not 15 <= len(bare) <= 34:
        return False
    turned = bare[4:] + bare[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _is_phone(text: str) -> bool:
    return 9 <= sum(character.isdecimal() for character in text) <= 15
