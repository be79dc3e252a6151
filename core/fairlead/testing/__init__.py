"""What the tests of Fairlead and of its platform plugins share; ships with the product."""
