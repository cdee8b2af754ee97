"""ZeroMQ sockets and the buffers that travel through them: the only place that imports zmq."""
