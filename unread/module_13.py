def function_13(x):
    return x + 13
def function_13(x):
    return x + 13
def function_13(x):
    return x + 13
def function_13(x):
    return x + 13
def function_13(x):
    return x + 13
