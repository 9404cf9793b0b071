"""Accelerate's loop over psa: the lines of a script stay, and the same bits come whatever dies. ::

    from psa_store.integrations.accelerate import PsaAccelerator

    with PsaAccelerator("my-gpt", steps=1000) as accelerator:  # instead of Accelerator(…)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Accelerate's kinds of distribution are a closed enumeration, so this is a subclass for one process, whose optimizer,
scheduler and train dataloader are those of a worker.
"""

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError(
        "psa_store.integrations.accelerate needs the package accelerate: pip install 'psa_store[integrations]'"
    ) from error

from psa_store.integrations.accelerate.accelerator import PsaAccelerator

__all__ = ["PsaAccelerator"]
