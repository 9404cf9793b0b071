"""What the calls of ``coordination.py`` do in one attempt: idempotent, so that one that was cut off is made again.

How each is idempotent stands beside it. Only ``coordination.py`` may use this.
"""

from __future__ import annotations

from psa_store.coordination.znodes import Znode, Znodes

PROBE = "-probe-"
"""How the znode begins with which it is tried what we may do. No job has such a name."""


def rehearse(znodes: Znodes, path: str) -> None:
    """A former attempt may have left it; it goes with the session at the latest."""
    znodes.create(path, "", ephemeral=True)
    znodes.set(path, "{}")
    znodes.get(path)
    znodes.delete(path)


def create_document(znodes: Znodes, path: str, text: str) -> bool:
    """After an attempt that was cut off, the same text counts as ours."""
    if znodes.create(path, text) is not None:
        return True
    node = znodes.get(path) if znodes.repeated else None
    return node is not None and node.text == text


def put_document(znodes: Znodes, path: str, text: str) -> None:
    """The same text written twice is the same."""
    while znodes.set(path, text) is None and znodes.create(path, text) is None:
        pass  # created or deleted between the two


def compare_and_set(znodes: Znodes, path: str, text: str, expected: int | None) -> Znode | None:
    """After an attempt that was cut off, our text at the version that we wanted to write is our own success."""
    if expected is None:
        node, wanted = znodes.create(path, text), 0
    else:
        node, wanted = znodes.set(path, text, expected), expected + 1
    if node is None and znodes.repeated:
        stored = znodes.get(path)
        if stored is not None and (stored.text, stored.version) == (text, wanted):
            node = stored
    return node


def join(znodes: Znodes, path: str, text: str, earlier: list[str]) -> int:
    """Returns the session that owns the node: ours. Ids are never reused, so any other owner is a former session."""
    znodes.delete(*earlier)
    while True:
        created = znodes.create(path, text, ephemeral=True)
        if created is not None:
            return created.owner
        node = znodes.get(path)
        if node is not None and node.owner == znodes.session_id and znodes.set(path, text) is not None:
            return node.owner
        znodes.delete(path)


def keep(znodes: Znodes, path: str, text: str) -> Znode | None:
    """Write our own node again if it says anything else; returns it as it was found, None if it is ours no longer."""
    node = znodes.get(path, watch=True)
    if node is None or node.owner != znodes.session_id:
        return None
    if node.text != text and znodes.set(path, text) is None:
        return None
    return node


def hold(znodes: Znodes, path: str, text: str) -> str | None:
    """The owner of the node shows whether an attempt that was cut off succeeded. One that has none holds nothing.

    It is read also where it was just created: the watch tells when another process writes over it or deletes it.
    """
    while True:
        znodes.create(path, text, ephemeral=True)
        node = znodes.get(path, watch=True)
        if node is None:
            continue
        if not node.owner:
            znodes.delete(path)
        elif node.owner != znodes.session_id:
            return node.text
        elif node.text == text or znodes.set(path, text) is not None:
            return None


def release(znodes: Znodes, path: str) -> None:
    node = znodes.get(path)
    if node is not None and node.owner == znodes.session_id:
        znodes.delete(path)


def delete_tree(znodes: Znodes, path: str) -> int:
    """Repeats while members that do not know of it yet put something back. Returns how many nodes there were."""
    deleted = 1
    while names := znodes.children(path):
        children = [f"{path}/{name}" for name in names]
        znodes.delete(*children)
        for child in children:
            deleted += delete_tree(znodes, child) if znodes.get(child) is not None else 1
    znodes.delete(path)
    return deleted
