"""Our functions in Lua, and the two ways to call them.

Redis 7 and Valkey have functions: a library is loaded once, is replicated, and survives restarts. Where FUNCTION is
missing (KeyDB, Dragonfly) or refused by an ACL, the same text is one script, and a function of it is called by its name
as the first argument. Redis forgets scripts when it restarts; then they are sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

FunctionCall = tuple[str, list[str], Sequence[Any]]
"""Name, keys, arguments."""

NAME = "psa_store"
TEXT = (files("psa_store.storage") / "functions.lua").read_text()
_SHEBANG = f"#!lua name={NAME}\n"
_REGISTER = "redis.register_function"
_BEFORE = (
    "local functions = {} local function register(name, callback) "
    "if type(name) == 'table' then name, callback = name.function_name, name.callback end "
    "functions[name] = callback end\n"
)
"""In the place of one line, so that lines have the same number in both."""
_AFTER = """
local arguments = {}
for i = 2, #ARGV do arguments[i - 1] = ARGV[i] end
return functions[ARGV[1]](KEYS, arguments)
"""


LIBRARY = f"{TEXT}-- {hashlib.sha256(TEXT.encode()).hexdigest()}\n"
"""Its last line tells it from those of other releases."""
SCRIPT = _BEFORE + LIBRARY.removeprefix(_SHEBANG).replace(_REGISTER, "register") + _AFTER
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
"""By which EVALSHA knows it."""


def words(call: FunctionCall, *, by_script: bool) -> tuple[Any, ...]:
    """The command that calls a function of the library."""
    name, its_keys, arguments = call
    if by_script:
        return ("EVALSHA", SCRIPT_SHA, len(its_keys), *its_keys, name, *arguments)
    return ("FCALL", name, len(its_keys), *its_keys, *arguments)
