"""GreedyNAS: one-shot neural architecture search that trains promising paths only."""
