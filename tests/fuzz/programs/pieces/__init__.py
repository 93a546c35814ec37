"""What programs are made of. Every public function writes a piece, into a `Build`."""
