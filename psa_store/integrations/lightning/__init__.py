"""Lightning's ``Trainer`` over psa: the same modules, data and callbacks, and the same bits whatever dies. ::

    import lightning as L
    from psa_store.integrations.lightning import PsaStrategy

    trainer = L.Trainer(strategy=PsaStrategy("my-gpt"), max_steps=1000)
    trainer.fit(module, loader)

``strategy="psa"`` is the same with the job's name in ``PSA_JOB``. One iteration of the Trainer is one step of the job:
where a process computes several ranks, ``training_step`` runs for each of them. The Trainer counts what the job counts,
also in a process that begins late or goes back, and what callbacks know is ``worker.state``.

As with transformers, a version is handled (validated, saved) by each worker before the next step, and what comes of
that is committed with the next version. So a worker that starts at a version validates it again.
"""

try:
    import lightning.pytorch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "psa_store.integrations.lightning needs the package lightning: pip install 'psa_store[integrations]'"
    ) from error

from psa_store.integrations.lightning.strategy import PsaStrategy

__all__ = ["PsaStrategy"]
