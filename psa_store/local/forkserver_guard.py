"""For the fork server alone, which imports it first: without, it would outlive its parent.

It notices the parent's end by a pipe, but its children inherit the other end of that pipe.
"""

from psa_store.local.guard import die_with_parent

die_with_parent()
