"""An engine's processes: started, watched, ended with their node, and what they leave behind."""
