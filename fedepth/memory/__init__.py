"""What a process really used, and its limits: meter, allocator, device."""
