"""Speed and memory as ratios: ways to compute the same thing, measured side by side.

    python -m replib bench --list

needs torch and torchvision, and nothing else; what lacks something is left out with the reason.
"""
