"""psa_store with the interfaces of other libraries."""
