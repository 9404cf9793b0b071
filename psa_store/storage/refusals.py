"""Which command an ACL refuses, where Redis does not say it.

Redis 7.0 names a command that it refuses to a function by the line on which that stands. Later ones say its name.
"""

from __future__ import annotations

import re

from psa_store.storage.library import TEXT

_BY_LINE = re.compile(r"can't run this command or subcommand script: (\w+), on @user_(?:function|script):(\d+)")
_CALL = re.compile(r"redis\.call\('(\w+)'")


def named(reason: str) -> str:
    """What Redis said, with the names of the commands if it told a line of our functions instead."""
    found = _BY_LINE.search(reason)
    if found is None:
        return reason
    line = TEXT.splitlines()[int(found[2]) - 1]
    commands = " or ".join(f"'{each.lower()}'" for each in dict.fromkeys(_CALL.findall(line)))
    return f"the user has no permissions to run the {commands} command, which {found[1]} does"


def is_of_acl(reason: str) -> bool:
    """Whether a function was refused something by an ACL."""
    return _BY_LINE.search(reason) is not None or "ACL failure in script" in reason
