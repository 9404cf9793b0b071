"""What tests and the chaos harness need inside the product: named failpoints, and a journal of what a process did."""
