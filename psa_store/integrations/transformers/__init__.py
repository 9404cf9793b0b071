"""Hugging Face's ``Trainer`` over psa: the same arguments and callbacks, and the same bits whatever dies. ::

    from psa_store.integrations.transformers import PsaTrainer

    trainer = PsaTrainer(model=model, args=arguments, train_dataset=train, job="my-gpt")     # instead of Trainer(…)
    trainer.train()

The loop is ours, since a process may compute several ranks, be restarted, and go back; what is in it is the Trainer's:
losses, optimizer and schedule by their arguments, callbacks, evaluation, checkpoint folders. What the Trainer knows
beside the parameters (the best metric, the patience of early stopping, the loss since the last log) is
``worker.state``, so it is what it was after a resume.

A version is *handled* (logged, evaluated, saved) by each worker as soon as it is there, before the next step. What
comes of that is committed with the next version. So a worker that starts at a version, or goes back to it, handles it
again.
"""

from psa_store.integrations.transformers.trainer import PsaTrainer

__all__ = ["PsaTrainer"]
