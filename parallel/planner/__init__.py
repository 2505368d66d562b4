"""What patch parallelism would bring, estimated without the machines."""
