"""From an SAE and a harvest to a feature store."""
