"""Before a run: what it will take in memory, time and money, and which method suits."""
