"""Installations of other systems, in the shape of their tables (the columns that matter, and some that do not), with awkward people in them."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import sqlalchemy as sa

# People without anything awkward, in each first list.
MANY = 3_000
DAY = 86_400
# 1 January 2020.
BEGIN = 1_577_836_800

INTERSPIRE = """
CREATE TABLE ss_lists (listid INT PRIMARY KEY AUTO_INCREMENT, name VARCHAR(255), ownername VARCHAR(255), bouncepassword VARCHAR(100), createdate INT);
CREATE TABLE ss_list_subscribers (subscriberid INT PRIMARY KEY AUTO_INCREMENT, listid INT NOT NULL DEFAULT 0, emailaddress VARCHAR(200),
  domainname VARCHAR(100), format CHAR(1), confirmed CHAR(1) DEFAULT '0', confirmcode VARCHAR(32), requestdate INT DEFAULT 0, requestip VARCHAR(20),
  confirmdate INT DEFAULT 0, confirmip VARCHAR(20), subscribedate INT DEFAULT 0, bounced INT DEFAULT 0, unsubscribed INT DEFAULT 0,
  unsubscribeconfirmed CHAR(1) DEFAULT '0', formid INT DEFAULT 0, UNIQUE KEY (emailaddress, listid), KEY (listid)) DEFAULT CHARSET=utf8mb4;
CREATE TABLE ss_list_subscribers_unsubscribe (subscriberid INT NOT NULL, unsubscribetime INT NOT NULL, unsubscribeip VARCHAR(20),
  unsubscriberequesttime INT DEFAULT 0, unsubscriberequestip VARCHAR(20), listid INT NOT NULL, statid INT, KEY (subscriberid, listid));
CREATE TABLE ss_list_subscriber_bounces (bounceid INT PRIMARY KEY AUTO_INCREMENT, subscriberid INT, statid INT, listid INT, bouncetime INT,
  bouncetype VARCHAR(255), bouncerule VARCHAR(255), bouncemessage LONGTEXT);
CREATE TABLE ss_customfields (fieldid INT PRIMARY KEY AUTO_INCREMENT, name VARCHAR(255), fieldtype VARCHAR(100), fieldsettings MEDIUMTEXT);
CREATE TABLE ss_subscribers_data (subscriberid INT NOT NULL, fieldid INT NOT NULL, data TEXT, UNIQUE KEY (subscriberid, fieldid)) DEFAULT CHARSET=latin1;
CREATE TABLE ss_banned_emails (banid INT PRIMARY KEY AUTO_INCREMENT, emailaddress VARCHAR(255), list VARCHAR(10), bandate INT)
"""
MAILWIZZ = """
CREATE TABLE mw_list (list_id INT PRIMARY KEY AUTO_INCREMENT, list_uid CHAR(13), customer_id INT, name VARCHAR(100), opt_in ENUM('double','single'),
  status CHAR(15), date_added DATETIME NOT NULL);
CREATE TABLE mw_list_subscriber (subscriber_id INT PRIMARY KEY AUTO_INCREMENT, subscriber_uid CHAR(13), list_id INT NOT NULL, email VARCHAR(150) NOT NULL,
  ip_address VARCHAR(45), source ENUM('web','api','import') NOT NULL DEFAULT 'web', status CHAR(15) NOT NULL, date_added DATETIME NOT NULL,
  last_updated DATETIME NOT NULL, KEY (list_id), KEY (email)) DEFAULT CHARSET=utf8mb4;
CREATE TABLE mw_list_subscriber_optin_history (subscriber_id INT PRIMARY KEY, optin_ip VARCHAR(45), optin_date DATETIME, confirm_ip VARCHAR(45),
  confirm_date DATETIME);
CREATE TABLE mw_list_subscriber_optout_history (subscriber_id INT PRIMARY KEY, optout_ip VARCHAR(45), optout_date DATETIME);
CREATE TABLE mw_list_field_type (type_id INT PRIMARY KEY, name VARCHAR(50), identifier VARCHAR(50));
CREATE TABLE mw_list_field (field_id INT PRIMARY KEY AUTO_INCREMENT, type_id INT, list_id INT, label VARCHAR(255), tag VARCHAR(50));
CREATE TABLE mw_list_field_value (value_id INT PRIMARY KEY AUTO_INCREMENT, field_id INT, subscriber_id INT, value VARCHAR(255), KEY (subscriber_id))
  DEFAULT CHARSET=utf8mb4;
CREATE TABLE mw_email_blacklist (email_id BIGINT PRIMARY KEY AUTO_INCREMENT, subscriber_id INT, email VARCHAR(150) NOT NULL, reason TEXT NOT NULL,
  date_added DATETIME NOT NULL, KEY (email));
CREATE TABLE mw_customer_suppression_list_email (email_id INT PRIMARY KEY AUTO_INCREMENT, list_id INT NOT NULL, email VARCHAR(150), email_md5 CHAR(32));
CREATE TABLE mw_campaign_bounce_log (log_id BIGINT PRIMARY KEY AUTO_INCREMENT, campaign_id INT, subscriber_id INT, message TEXT,
  bounce_type ENUM('hard','soft'), date_added DATETIME NOT NULL, KEY (subscriber_id));
CREATE TABLE mw_campaign_complain_log (log_id BIGINT PRIMARY KEY AUTO_INCREMENT, campaign_id INT, subscriber_id INT, message TEXT,
  date_added DATETIME NOT NULL);
CREATE TABLE mw_campaign_track_unsubscribe (id BIGINT PRIMARY KEY AUTO_INCREMENT, campaign_id INT, subscriber_id INT, ip_address VARCHAR(45),
  date_added DATETIME NOT NULL)
"""
LISTMONK = """
CREATE TYPE list_optin AS ENUM ('single', 'double');
CREATE TYPE subscriber_status AS ENUM ('enabled', 'disabled', 'blocklisted');
CREATE TYPE subscription_status AS ENUM ('unconfirmed', 'confirmed', 'unsubscribed');
CREATE TYPE bounce_type AS ENUM ('soft', 'hard', 'complaint');
CREATE TABLE subscribers (id SERIAL PRIMARY KEY, email TEXT NOT NULL UNIQUE, name TEXT NOT NULL, attribs JSONB NOT NULL DEFAULT '{}',
  status subscriber_status NOT NULL DEFAULT 'enabled', created_at TIMESTAMPTZ DEFAULT NOW(), updated_at TIMESTAMPTZ DEFAULT NOW());
CREATE TABLE lists (id SERIAL PRIMARY KEY, name TEXT NOT NULL, optin list_optin NOT NULL DEFAULT 'single');
CREATE TABLE subscriber_lists (subscriber_id INTEGER REFERENCES subscribers(id), list_id INTEGER REFERENCES lists(id), meta JSONB NOT NULL DEFAULT '{}',
  status subscription_status NOT NULL DEFAULT 'unconfirmed', created_at TIMESTAMPTZ DEFAULT NOW(), updated_at TIMESTAMPTZ DEFAULT NOW(),
  PRIMARY KEY (subscriber_id, list_id));
CREATE TABLE bounces (id SERIAL PRIMARY KEY, subscriber_id INTEGER NOT NULL REFERENCES subscribers(id), type bounce_type NOT NULL DEFAULT 'hard',
  source TEXT NOT NULL DEFAULT '', meta JSONB NOT NULL DEFAULT '{}', created_at TIMESTAMPTZ DEFAULT NOW())
"""


def _make(engine: sa.Engine, schema: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    with engine.begin() as connection:
        for statement in schema.split(";"):
            connection.exec_driver_sql(statement)
        if engine.dialect.name != "postgresql":
            # As the installations of these systems run: zero dates are allowed.
            connection.exec_driver_sql("SET SESSION sql_mode = ''")
        names = sa.inspect(connection)
        for table, given in rows.items():
            for columns in {tuple(row) for row in given}:
                same = [row for row in given if tuple(row) == columns]
                marks = ", ".join(f"CAST(:{name} AS JSONB)" if name in ("attribs", "meta") else f":{name}" for name in columns)
                if engine.dialect.name == "postgresql":
                    types = {column["name"]: column["type"] for column in names.get_columns(table)}
                    marks = ", ".join(f"CAST(:{name} AS {types[name].compile(engine.dialect)})" for name in columns)
                connection.execute(sa.text(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"), same)


def interspire(engine: sa.Engine) -> None:
    people: list[dict[str, Any]] = []
    data: list[dict[str, Any]] = []

    def add(listid: int, email: str, values: dict[int, str] | None = None, **columns: Any) -> int:
        id_ = len(people) + 1
        people.append({"subscriberid": id_, "listid": listid, "emailaddress": email, "confirmed": "1", "subscribedate": BEGIN, **columns})
        data.extend({"subscriberid": id_, "fieldid": field, "data": text} for field, text in (values or {}).items())
        return id_

    for number in range(MANY):
        add(1, f"user{number}@example.test", {1: f"Name {number}", 3: str(number % 90)}, requestip="192.0.2.1", requestdate=BEGIN - 9, formid=7)
    add(1, "  Ann.UPPER@Example.TEST ", {1: "MÃ¼ller &amp; Co", 2: 'a:2:{i:0;s:3:"Red";i:1;s:4:"Blue";}', 4: "31/12/1999", 5: "Main St"})
    add(1, "post@bücher.example", {4: "00/00/0000"})
    # The same address in other letters.
    add(1, "post@xn--bcher-kva.example", {1: "Twice"})
    add(1, "no address")
    add(1, "")
    add(1, "jürgen@example.test")
    add(1, "gone@example.test", unsubscribed=BEGIN + DAY, unsubscribeconfirmed="1")
    asked = add(1, "asked@example.test")
    back = add(1, "back@example.test", subscribedate=BEGIN + 9 * DAY)
    dead = add(1, "dead@example.test", bounced=BEGIN + 2 * DAY)
    add(1, "waiting@example.test", confirmed="0", requestdate=BEGIN)
    add(1, "banned@example.test")
    add(1, "someone@banned.example")
    # On the other list: left the first and stays here; another value of a field; values that are not of its type.
    add(2, "gone@example.test", {1: "Still here"})
    add(2, "user1@example.test", {1: "Newer name", 3: "many"})
    add(2, "user2@example.test", unsubscribed=BEGIN + 5 * DAY)
    lists = [(1, "News &amp; Offers"), (2, "Angebote Ü"), (3, "news offers"), (4, "日本")]
    bounce = {"bouncetype": "hard", "bouncerule": "emaildoesntexist", "listid": 1}
    rows: dict[str, list[dict[str, Any]]] = {
        "ss_lists": [{"listid": number, "name": name} for number, name in lists],
        "ss_list_subscribers": people,
        "ss_list_subscribers_unsubscribe": [
            # Asked, and has not confirmed it yet: as Interspire writes it.
            {
                **{"subscriberid": asked, "listid": 1, "unsubscribetime": 0, "unsubscribeip": ""},
                **{"unsubscriberequesttime": BEGIN + 3 * DAY, "unsubscriberequestip": "198.51.100.7"},
            },
            {"subscriberid": back, "listid": 1, "unsubscribetime": BEGIN + 3 * DAY, "unsubscribeip": "198.51.100.8"},
        ],
        "ss_list_subscriber_bounces": [
            {**bounce, "subscriberid": dead, "bouncetime": BEGIN + 2 * DAY, "bouncemessage": "550 5.1.1 <dead@example.test>: user unknown"},
            {**bounce, "subscriberid": 5, "bouncetime": 0, "bouncetype": "soft", "bouncemessage": "452 4.2.2 full"},
            {**bounce, "subscriberid": 999_999, "bouncetime": 1, "bouncemessage": ""},
        ],
        "ss_customfields": [
            {"fieldid": number, "name": name, "fieldtype": kind}
            for number, (name, kind) in enumerate(
                [("First Name", "text"), ("Colours", "checkbox"), ("Age", "number"), ("Birthday", "date"), ("Address", "text"), ("名前", "text")], 1
            )
        ],
        "ss_subscribers_data": data,
        "ss_banned_emails": [
            {"emailaddress": email, "list": list_, "bandate": BEGIN + DAY}
            for email, list_ in [("BANNED@example.test", "g"), ("banned.example", "g"), ("@other.example", "g"), ("user9@example.test", "2"), ("rubbish@", "g")]
        ],
    }
    _make(engine, INTERSPIRE, rows)


def mailwizz(engine: sa.Engine) -> None:
    people: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    added = dt.datetime(2020, 1, 1)

    def add(list_id: int, email: str, status: str = "confirmed", *texts: tuple[int, str], **columns: Any) -> int:
        id_ = len(people) + 1
        people.append({"subscriber_id": id_, "list_id": list_id, "email": email, "status": status, "date_added": added, "last_updated": added, **columns})
        values.extend({"subscriber_id": id_, "field_id": field, "value": text} for field, text in texts)
        return id_

    for number in range(MANY):
        add(1, f"user{number}@example.test", "confirmed", (1, f"user{number}@example.test"), (2, f"Name {number}"))
    add(1, "Emoji@Example.TEST", "confirmed", (2, "😀 &lt;b&gt;"), (3, "red"), (3, "blue"), (4, "0000-00-00"), ip_address="192.0.2.5")
    left = add(1, "left@example.test", "unsubscribed", last_updated=dt.datetime(2020, 5, 5))
    add(1, "left2@example.test", "unsubscribed", date_added="0000-00-00 00:00:00", last_updated="0000-00-00 00:00:00")
    black = add(1, "black@example.test", "blacklisted")
    hard = add(1, "hard@example.test", "blacklisted")
    add(1, "waiting@example.test", "unconfirmed")
    add(1, "new@example.test", "unapproved")
    add(1, "moved@example.test", "moved")
    angry = add(1, "angry@example.test")
    add(1, "broken@@example.test")
    add(2, "left@example.test", "confirmed", (6, "12"))
    rows: dict[str, list[dict[str, Any]]] = {
        "mw_list": [{"list_id": number, "name": name, "date_added": added} for number, name in ((1, "Kunden &amp; Freunde"), (2, "Shop"))],
        "mw_list_subscriber": people,
        "mw_list_subscriber_optin_history": [
            {"subscriber_id": 1, "optin_ip": "192.0.2.1", "optin_date": added, "confirm_ip": "192.0.2.2", "confirm_date": dt.datetime(2020, 1, 2)}
        ],
        "mw_list_subscriber_optout_history": [{"subscriber_id": left, "optout_ip": "192.0.2.3", "optout_date": dt.datetime(2020, 4, 4)}],
        "mw_list_field_type": [{"type_id": number, "identifier": kind} for number, kind in enumerate(("text", "multiselect", "date", "rating", "datetime"), 1)],
        "mw_list_field": [
            {"field_id": number, "type_id": type_id, "list_id": list_id, "label": tag.title(), "tag": tag}
            for number, (type_id, list_id, tag) in enumerate(
                [(1, 1, "EMAIL"), (1, 1, "FNAME"), (2, 1, "COLOURS"), (3, 1, "BORN"), (1, 2, "EMAIL"), (4, 2, "STARS")], 1
            )
        ],
        "mw_list_field_value": values,
        "mw_email_blacklist": [
            {"subscriber_id": black, "email": "black@example.test", "reason": "550 5.1.1 No such user", "date_added": dt.datetime(2020, 3, 3)},
            {"subscriber_id": None, "email": "spam@example.test", "reason": "Abuse complaint", "date_added": dt.datetime(2020, 3, 3)},
            {"subscriber_id": None, "email": "d41d8cd98f00b204e9800998ecf8427e", "reason": "", "date_added": dt.datetime(2020, 3, 3)},
        ],
        "mw_customer_suppression_list_email": [
            {"list_id": 1, "email": "user8@example.test", "email_md5": None},
            {"list_id": 1, "email": None, "email_md5": "d41d8cd98f00b204e9800998ecf8427e"},
        ],
        "mw_campaign_bounce_log": [
            {"subscriber_id": hard, "message": "550 5.1.1 hard@example.test unknown", "bounce_type": "hard", "date_added": dt.datetime(2020, 3, 4)},
            {"subscriber_id": 3, "message": "452 4.2.2", "bounce_type": "soft", "date_added": dt.datetime(2020, 3, 4)},
        ],
        "mw_campaign_complain_log": [{"subscriber_id": angry, "message": "", "date_added": dt.datetime(2020, 6, 6)}],
    }
    _make(engine, MAILWIZZ, rows)


def listmonk(engine: sa.Engine) -> None:
    people: list[dict[str, Any]] = []
    subscribed: list[dict[str, Any]] = []
    at = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)

    def add(email: str, lists: dict[int, str], attribs: dict[str, Any] | None = None, **columns: Any) -> int:
        id_ = len(people) + 1
        row = {"id": id_, "email": email, "name": "", "attribs": json.dumps(attribs or {}), "created_at": at, "updated_at": at}
        people.append({**row, "status": "enabled", **columns})
        for list_id, status in lists.items():
            meta = json.dumps({"optin_ip": "192.0.2.1"} if status == "confirmed" else {})
            later = at + dt.timedelta(days=3)
            subscribed.append({"subscriber_id": id_, "list_id": list_id, "status": status, "meta": meta, "created_at": at, "updated_at": later})
        return id_

    for number in range(MANY):
        born = f"19{number % 90 + 10}-01-02"
        add(f"user{number}@example.test", {1: "confirmed"}, {"city": "Köln", "age": number % 90, "vip": number % 2 == 0, "zip": "01234", "born": born})
    add("upper@example.test", {1: "unconfirmed", 2: "unconfirmed"}, {"tags": ["a", "b"], "city": {"x": 1}, "id": "own"}, name="Ann & Bob <b>")
    add("left@example.test", {1: "unsubscribed", 2: "confirmed"})
    blocked = add("blocked@example.test", {1: "unsubscribed", 2: "unconfirmed"}, status="blocklisted")
    dead = add("dead@example.test", {1: "confirmed"}, status="blocklisted")
    add("off@example.test", {1: "confirmed"}, status="disabled")
    add("nowhere@example.test", {})
    add("not an address", {1: "confirmed"})
    rows = {
        "subscribers": people,
        "lists": [{"id": 1, "name": "Open", "optin": "single"}, {"id": 2, "name": "Double", "optin": "double"}],
        "subscriber_lists": subscribed,
        "bounces": [
            {"subscriber_id": dead, "type": "hard", "source": "ses", "meta": json.dumps({"status": "5.1.1"}), "created_at": at},
            {"subscriber_id": blocked, "type": "soft", "source": "pop", "meta": "{}", "created_at": at},
            {"subscriber_id": 7, "type": "complaint", "source": "ses", "meta": "{}", "created_at": at},
        ],
    }
    _make(engine, LISTMONK, rows)
