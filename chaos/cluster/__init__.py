"""The cluster under test: its hosts and network, ZooKeeper, Redis, and the processes of the job."""
