"""What `bench front` measures with: bare servers, clients that note bytes and times, and processes."""
