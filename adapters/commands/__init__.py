"""One file a command: its options, the public function that it calls, and the lines that it prints."""
