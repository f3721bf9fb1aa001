"""The evaluation of Llumnix (OSDI'24) in the simulator: one command for each figure."""
