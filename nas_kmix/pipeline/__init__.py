"""The stages from images to a genotype and its trained network, one module each; `stage` defines what a stage is."""
