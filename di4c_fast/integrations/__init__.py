"""Drop-ins for other repositories, one module each."""
