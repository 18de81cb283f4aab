"""The C++ passes: their sources, and how they are built and loaded (`build`)."""
