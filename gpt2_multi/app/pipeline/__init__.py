"""The pipeline that transformers has: texts and chats to texts."""
