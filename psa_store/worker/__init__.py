"""The worker role: computes gradients for ranks of a job, inside the user's training script."""

from psa_store.worker.worker import Worker

__all__ = ["Worker"]
