"""Steps on a Kubernetes cluster. The only package that imports the Kubernetes client."""
