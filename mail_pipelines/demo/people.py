"""The demo's made-up people, the same on every machine. Importing this loads nothing but the standard library."""

from __future__ import annotations

import datetime as dt
import random
import unicodedata
from typing import Any

SEED = 20261124
COLUMNS = ("email", "first_name", "last_name", "country", "city", "birthday", "orders", "vip", "signup")
# Names that occur nowhere else, so that a search of logs and run storage for them proves that nobody's name got there.
FIRST_NAMES = (
    *("Quillana", "Zorvald", "Ysmaree", "Thörvina", "Œlindra", "Brânduxa", "Ñadrien", "Żywomira", "Kjærulf", "Ihsâneb", "Xanthippos", "Wolfrunde"),
    *("Přemyslava", "Gwynnora", "Åsbjörk", "Ljubomirka", "Ðurađa", "Fionnghal", "Ólavine", "Mézaline", "Tündérka", "Ülkümen", "Çağrınur", "Søgni"),
)
SURNAMES = (
    *("Quillfeather", "Zimtwöhler", "Brzozdębski", "Ó Vaelcháin", "d'Ambrelune", "Kvistgårdsen", "Thistlewrack", "Ñuflórez", "Wolkenstöckl"),
    *("Ünverdağlı", "Mezőkövári", "Vlkodlaková", "Hjarnsvik", "Œuvrardin", "Pennyquicke", "Łaszczykowa", "Grafvenitz", "Sæmundrún", "Tarantelli-Voss"),
    *("Dragomirești", "Ćosanović", "van der Nachtegaele", "Ysterhuizen", "Zakhartseva", "Morgenthaler-Ück", "Ekwuruibe", "Şimşekoğlu", "Bláthnaid"),
)
PLACES = {
    "DE": ("Köln", "München", "Berlin", "Lübeck"),
    "FR": ("Orléans", "Besançon", "Lyon", "Nîmes"),
    "GB": ("Leeds", "York", "Bath"),
    "PL": ("Łódź", "Kraków", "Gdańsk"),
    "ES": ("Málaga", "Gijón", "Cádiz"),
    "SE": ("Malmö", "Umeå"),
    "CZ": ("Plzeň", "Brno"),
}
DOMAINS = {"google.test": 0.34, "microsoft.test": 0.20, "yahoo.test": 0.12, "apple.test": 0.06, "gmx.test": 0.05}
OTHER_DOMAINS = tuple(
    f"{word}{number}.test" for number in range(1, 21) for word in ("post", "mail", "firma", "club", "town", "lake", "garden", "studio", "net", "büro")
)
TODAY = dt.date(2026, 11, 1)


def make_person(draw: random.Random, number: int) -> tuple[Any, ...]:
    """Number `number`, by `COLUMNS`. With the same draws before, the same one; each number has an address of its own."""
    first, last = draw.choice(FIRST_NAMES), draw.choice(SURNAMES)
    country = draw.choice(tuple(PLACES))
    domain = draw.choices((*DOMAINS, ""), (*DOMAINS.values(), 1 - sum(DOMAINS.values())))[0] or draw.choice(OTHER_DOMAINS)
    birthday = dt.date(1940, 1, 1) + dt.timedelta(days=draw.randrange(65 * 365)) if draw.random() < 0.8 else None
    # Most buy nothing, some once, few often.
    orders = min(int(draw.expovariate(1.2)), 40)
    vip = orders >= 4 or draw.random() < 0.005
    signup = TODAY - dt.timedelta(days=int(draw.expovariate(1 / 500)))
    return f"{_plain(first)}.{_plain(last)}{number}@{domain}", first, last, country, draw.choice(PLACES[country]), birthday, orders, vip, signup


def _plain(name: str) -> str:
    """A name as it stands in an address."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", name) if letter.isascii() and letter.isalpha()).lower()
