"""Pictures of flat icons, prompts for them, and a checker of pictures against prompts."""
