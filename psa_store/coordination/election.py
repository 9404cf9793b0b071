"""The election of the controller: of all candidates, the one that has waited longest is elected.

A candidate is an ephemeral sequential znode ``<session>-<sequence>`` that holds the member's id. The session in its
name finds a candidate again whose creation was cut off: entering twice is therefore harmless, and so are duplicates,
since the lowest counts. An election may have two winners for a moment (the old one paused): a process that acts on it
must take a term. A znode that its own session does not keep is no candidate; one whose znode is gone or says something
else has to campaign again. Only ``coordination.py`` may use it.
"""

from __future__ import annotations

import re

from psa_store.coordination.znodes import Znode, Znodes

_NAME = re.compile(r"[0-9a-f]{16}-\d{1,10}", re.ASCII)


def campaign(znodes: Znodes, folder: str, member: str) -> None:
    """Be a candidate. A session has one member as candidate: under another id, the earlier one is withdrawn."""
    while True:
        session = znodes.session_id
        mine = [f"{folder}/{name}" for name in _candidates(znodes, folder) if _is_of(name, session)]
        found = [node for node in znodes.get_all(mine) if node is not None]
        znodes.delete(*(node.path for node in found if node.text != member))
        if any(node.text == member for node in found):
            return
        created = znodes.create(f"{folder}/{_prefix(session)}", member, ephemeral=True, sequence=True)
        assert created is not None, "a sequential name was used twice"
        if created.owner == session:
            return
        znodes.delete(created.path)  # our session expired in between: it would not be found by its name


def is_elected(znodes: Znodes, folder: str, member: str) -> bool:
    """Whether ``member`` of this session is elected; if another is, a watch waits for the one just before us."""
    while True:
        found = _kept(znodes, folder)
        place = next((i for i, node in enumerate(found) if node.owner == znodes.session_id), None)
        if place is None:
            return False
        if place == 0:
            return found[place].text == member
        if znodes.get(found[place - 1].path, watch=True) is not None:
            return False


def elected(znodes: Znodes, folder: str) -> str | None:
    """The elected member; None if there is no candidate."""
    return next((node.text for node in _kept(znodes, folder)), None)


def withdraw(znodes: Znodes, folder: str, member: str) -> None:
    """Delete the candidates of a member, of whatever session."""
    found = znodes.get_all([f"{folder}/{name}" for name in znodes.children(folder)])
    znodes.delete(*(node.path for node in found if node is not None and node.text == member))


def _candidates(znodes: Znodes, folder: str) -> list[str]:
    names = filter(_NAME.fullmatch, znodes.children(folder))
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def _kept(znodes: Znodes, folder: str) -> list[Znode]:
    """The candidates in their order, each kept by the session that its name says."""
    found = znodes.get_all([f"{folder}/{name}" for name in _candidates(znodes, folder)])
    kept = (node for node in found if node is not None and node.owner)
    return [node for node in kept if _is_of(node.path.rpartition("/")[2], node.owner)]


def _prefix(session: int) -> str:
    return f"{session & 0xFFFF_FFFF_FFFF_FFFF:016x}-"


def _is_of(name: str, session: int) -> bool:
    return name.startswith(_prefix(session))
