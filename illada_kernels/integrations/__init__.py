"""What knows another library: one module a library, which imports it only when it is used."""
