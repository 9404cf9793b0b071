"""The proof of the promises: drives a real cluster through faults while it trains, and judges the journals."""
