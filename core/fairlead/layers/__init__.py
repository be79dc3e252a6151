"""The building blocks that model families share. Each takes its ops from the BuildContext it is made with."""
