"""Remote drafting beside what a user would run otherwise, arm by arm in one run; trees and demo."""
