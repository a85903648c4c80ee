"""Training the bundled model on the rendered world (forgedit.world), and measuring what it reaches there."""
